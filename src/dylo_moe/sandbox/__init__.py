"""Runs code that nobody has read: `jail.Jail` starts a process that can do no harm, `ladder.choose` says how."""
