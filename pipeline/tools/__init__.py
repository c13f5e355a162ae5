"""Commands that look at what stages wrote, a file each."""
