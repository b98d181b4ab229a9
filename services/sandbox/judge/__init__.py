"""The process that runs the tests and alone decides whether they hold."""
