package kubernetes

import (
	"encoding/json"
	"testing"
)

// How a preInit hook has ended is how it ended last: the kubelet runs one again that has ended badly.
func TestWhichPreInit(t *testing.T) {
	const well, badly = `{"terminated":{"exitCode":0}}`, `{"terminated":{"exitCode":9}}`
	for name, test := range map[string]struct {
		first, second string
		hook          int
		failed        string
	}{
		"the first runs":           {`{"state":{"running":{}}}`, `{"state":{"waiting":{}}}`, 0, ""},
		"the first fails":          {`{"state":` + badly + `}`, `{"state":{"waiting":{}}}`, 0, "exit status 9"},
		"the first is tried again": {`{"state":{"waiting":{}},"lastState":` + badly + `}`, `{"state":{"waiting":{}}}`, 0, "exit status 9"},
		"it passes when it is":     {`{"state":` + well + `,"lastState":` + badly + `}`, `{"state":{"running":{}}}`, 1, ""},
		"it fails when it is":      {`{"state":` + badly + `,"lastState":` + well + `}`, `{"state":{"waiting":{}}}`, 0, "exit status 9"},
		"both have passed":         {`{"state":` + well + `}`, `{"state":` + well + `}`, -1, ""},
		"the first runs once more": {`{"state":{"running":{}},"lastState":` + well + `}`, `{"state":{"waiting":{}},"lastState":` + well + `}`, 0, ""},
	} {
		var pod item
		if err := json.Unmarshal([]byte(`{"status":{"initContainerStatuses":[`+test.first+`,`+test.second+`]}}`), &pod); err != nil {
			t.Fatal(err)
		}
		if hook, failed := (&found{pods: []item{pod}}).preInit(); hook != test.hook || failed != test.failed {
			t.Errorf("%s: hook %d %q; want %d %q", name, hook, failed, test.hook, test.failed)
		}
	}
}
