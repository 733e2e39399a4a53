package docker

import "os"

// childState tells a child process of a test which state folder to work on.
const childState = "KMO_TEST_STATE"

func child() { os.Exit(0) }
