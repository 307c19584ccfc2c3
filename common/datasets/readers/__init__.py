"""One module for each format of annotations. Large files are cached, see `cached_index`."""
