"""Client runtimes: what turns a task into an update."""
