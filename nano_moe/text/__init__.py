"""Text on disk: corpora, their split, tokenizers, prepared token files and windows over them.

Read in this order: `corpus` (documents), `split`, `tokenizer`, `store` (the cache), `windows`.
Nothing in this room imports torch or Lightning.
"""
