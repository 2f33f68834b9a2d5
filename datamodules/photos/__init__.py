"""A photo: bytes by its name, from a folder, a tar or the web, and bytes to pixels."""
