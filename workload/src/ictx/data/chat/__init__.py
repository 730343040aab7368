"""Conversations and preferences: read in the usual formats, kept in one."""
