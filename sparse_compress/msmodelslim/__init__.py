"""msModelSlim's directories, compressed and decompressed."""
