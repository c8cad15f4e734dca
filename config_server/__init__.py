"""Registration, certificates, grants, the RPO ledger, recovery points; never on the data path."""
