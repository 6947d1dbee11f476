"""Small tasks made of the validation split: bits per byte, minimal pairs, cloze."""
