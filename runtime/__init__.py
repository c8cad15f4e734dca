"""What every program needs to run as a service, and nothing about replication: settings, logs, metrics endpoint,
signals, membership.

Imported by the programs' shells only; cores never import it.
"""
