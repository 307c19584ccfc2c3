"""What no paper claims as its own: data, backbones, matching, training mechanics, metrics, pictures."""
