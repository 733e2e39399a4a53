package template

import "reflect"

// Decode reads one YAML file of kMO's own, the agent's for one, as strictly as a site's: data into into, a pointer to a struct whose
// tags are those of this package's types. Keys that are not there leave what into has. Every fault of the file is a refusal, joined.
func Decode(file string, data []byte, into any) error {
	d, p := newDecoder(), &problems{}
	d.learn(reflect.TypeOf(into).Elem())
	if n := parse(file, data, p); n != nil {
		d.decode(n, into, p)
	}
	return p.err()
}
