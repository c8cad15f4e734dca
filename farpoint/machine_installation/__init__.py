"""`farpoint machines install`: puts the mobility agent onto machines over SSH, and makes them members of the vault."""
