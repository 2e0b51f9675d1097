"""Opens checkpoint folders, converts them from and to original files, merges and downloads them."""
