"""Running attempts on the devices of this host: scheduler, supervisor, reconciliation."""
