"""What results look like: one HTML page with everything inline, and the pictures in it.

`gather` reads results and manifests, `model_charts`, `result_charts` and `plan_picture` draw them with the shapes and
axes of `svg`, `page` puts it together; `python -m windquant.report` is the step.
"""
