"""What a sweep takes before it runs: counted exactly, timed by short measurements.

- `sweeps.planning.plan` counts trials, epochs, images and disk, and adds up the time;
- `sweeps.planning.share` says how many of its epochs a trial runs that a pruner may end;
- `sweeps.planning.shapes` says which trials take equally long;
- `sweeps.planning.speeds` has what was measured of a shape, and keeps it on this machine;
- `sweeps.planning.stopwatch` measures a shape in this process;
- `sweeps.planning.sampling` does so in as many processes as there would be workers;
- `sweeps.planning.measuring` fills a plan with measurements, new or kept;
- `sweeps.planning.words` says a plan in lines and a table.
"""
