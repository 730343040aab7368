"""Conversations and preferences: read in the usual formats, stored in one."""
