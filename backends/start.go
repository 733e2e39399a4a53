package backends

import "strings"

// StartError says that the workload itself is at fault: a hook ended badly, its program cannot be executed. Trying the same
// workload again is of no use; any other error of Apply means that the backend did not answer.
type StartError struct {
	Workload string
	Stage    string // "preInit [/app migrate]", "exec /app"
	Output   string // the last of what it wrote, at most 4 KiB
	Cause    string
}

// Error names the workload, the stage and the cause, and ends with what was written.
func (e *StartError) Error() string {
	text := e.Workload + ": " + e.Stage + ": " + e.Cause
	if output := strings.TrimSpace(e.Output); output != "" {
		text += ": " + output
	}
	return text
}
