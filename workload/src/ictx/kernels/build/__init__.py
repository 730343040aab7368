"""Compilation ahead of time: what is launched, what the compiler made of it, the folder that ships."""
