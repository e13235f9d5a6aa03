"""data.text: a file -> rows -> token ids. See README.md in this folder."""
