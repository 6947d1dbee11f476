"""Text on disk: corpora, their split, tokenizers, prepared token files and windows over them.

Read in this order: `corpus` (documents, of packages, `files` or the `hub`), `split`, `shelf` (many
of them), `tokenizer`, `store` (the cache) and its `writer`, `windows`.
Nothing in this room imports torch or Lightning.
"""
