"""What the commands do, one module for each panel of ``cogumi --help``; imported when a command runs."""
