package registry

import (
	"io"
	"log"
	"net/http"

	"github.com/google/go-containerregistry/pkg/authn"
	inmemory "github.com/google/go-containerregistry/pkg/registry"
)

// Memory is a registry in memory, with referrers, for demos and tests. It asks nobody who they are: serve it on the loopback.
func Memory() http.Handler {
	return inmemory.New(inmemory.Logger(log.New(io.Discard, "", 0)), inmemory.WithReferrersSupport(true))
}

// UserKeychain is the credentials of whoever runs this process: docker's configuration and its helpers.
func UserKeychain() authn.Keychain { return authn.DefaultKeychain }
