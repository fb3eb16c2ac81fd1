"""Drills: a real workflow against a schedule of faults and kills, and an account of what that did to it."""

TOOL_SCHEDULE = "RIDETHROUGH_DRILL_TOOLS"
"""The environment variable that names the schedule of tool faults; set for the processes of a drill, and by nobody
else. The file's form is that of ``ridethrough.runtime.drill.ground.tool_schedule``."""
