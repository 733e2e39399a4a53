//go:build race

package template

// overhead is how much more memory the race detector takes.
const overhead = 4
