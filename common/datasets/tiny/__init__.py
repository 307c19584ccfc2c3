"""The generated datasets of --tiny."""
