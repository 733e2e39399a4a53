//go:build !linux

// Package program holds the process of a container, on Linux only.
package program
