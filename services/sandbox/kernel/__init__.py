"""The kernel's side of the jail: system calls, filters and groups by ctypes, with no dependency."""
