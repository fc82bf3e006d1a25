"""The web server of sbtk: the page to draw on, and the API that it uses."""
