"""The verbs, one file each: arguments, then one call."""
