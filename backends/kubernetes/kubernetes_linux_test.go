package kubernetes

import (
	"strings"
	"testing"

	"github.com/kindos/kmo/backends"
	"github.com/kindos/kmo/backends/conformance"
	"github.com/kindos/kmo/registry/merkle"
)

const childEnv = "KMO_KUBERNETES_CHILD"

// ref is an image by its digest; there is none of it.
func ref(digit string) backends.Image {
	digest := strings.Repeat(digit, 64)
	return backends.Image{Ref: "reg.example/app@sha256:" + digest, SHA256: digest}
}

func open(t testing.TB, o Options) *Backend {
	t.Helper()
	b, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// TestConformance works as the account of the manifest, with its rights and no others.
func TestConformance(t *testing.T) {
	conformance.Test(t, func(t *testing.T) conformance.Subject {
		namespace, account := control.site(t)
		options := Options{Kubeconfig: account, Namespace: namespace, State: t.TempDir()}
		return conformance.Subject{
			Open:     func(t *testing.T) backends.Backend { return open(t, options) },
			Images:   map[backends.Format]backends.Image{backends.OCI: ref("a")},
			Programs: conformance.Played,
			Table:    "testdata/features",
			Leaks:    func(t *testing.T) []string { return control.objects(t, namespace) },
		}
	})
}

// workload is one of a unit, with a name of its own for each digit.
func workload(unit, digit string) backends.Workload {
	spec, err := merkle.Parse("kmo1:sha3-256:" + strings.Repeat(digit, 64))
	if err != nil {
		panic(err)
	}
	return backends.Workload{
		Name: unit + "-" + spec.Short(), Unit: unit, Spec: spec, Backend: Name, Tier: 3, Format: backends.OCI, Image: ref("a"),
		Run: backends.Run{User: 65532}, Resources: backends.Resources{CPU: 1500, Memory: 64 << 20},
	}
}
