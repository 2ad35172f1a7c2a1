"""Runs on a cluster: growth stage by stage, `status`, fetching what compute nodes cannot download."""
