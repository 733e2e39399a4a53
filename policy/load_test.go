package policy

import (
	"context"
	"testing"

	shipped "github.com/kindos/kmo/rego"
)

func TestLoadShipped(t *testing.T) {
	set, err := Load(shipped.Rules())
	if err != nil {
		t.Fatal(err)
	}
	c, _ := readCorpus()
	d, err := set.Replay(context.Background(), c.base)
	t.Log(d.Took, err, d.Refusal(), d.Evaluated)
	for _, id := range shipped.IDs() {
		for name, p := range c.cases[id].Trip {
			in, err := c.input(p)
			if err != nil {
				t.Fatal(err)
			}
			d, err := set.Replay(context.Background(), in)
			t.Logf("%s %s %v\n%v", id, name, err, d.Refusal())
		}
		for name, p := range c.cases[id].Near {
			in, err := c.input(p)
			if err != nil {
				t.Fatal(err)
			}
			d, err := set.Replay(context.Background(), in)
			if err != nil || d.Refusal() != nil {
				t.Logf("NEAR %s %s %v\n%v", id, name, err, d.Refusal())
			}
		}
	}
}
