"""The built-in components, registered exactly as a third party's are."""
