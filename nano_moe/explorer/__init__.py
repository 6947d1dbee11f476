"""The explorer: a page that shows a trained run at work, served here or written as one file."""
