"""The sections of the report: what each reads, says, tabulates and draws."""
