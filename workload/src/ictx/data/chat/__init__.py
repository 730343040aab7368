"""Conversations and preferences: read in the forms that people have them in, kept in one."""
