"""What results look like: one HTML page with everything inline, and the pictures in it.

`svg` draws shapes and axes, `charts` and `plan` make the pictures, `gather` reads what they show from results and
manifests, `page` puts it together; `python -m windquant.report` is the step.
"""
