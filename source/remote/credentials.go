package remote

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// credentialFiles are where the programs of containers keep credentials, the first one first.
func credentialFiles() (paths []string) {
	add := func(dir string, names ...string) {
		if dir != "" {
			paths = append(paths, filepath.Join(append([]string{dir}, names...)...))
		}
	}
	add(os.Getenv("REGISTRY_AUTH_FILE"))
	add(os.Getenv("DOCKER_CONFIG"), "config.json")
	add(os.Getenv("XDG_RUNTIME_DIR"), "containers", "auth.json")
	if home, err := os.UserHomeDir(); err == nil {
		add(home, ".config", "containers", "auth.json")
		if os.Getenv("DOCKER_CONFIG") == "" {
			add(home, ".docker", "config.json")
		}
	}
	return paths
}

// credentials returns a function that looks credentials up in these files. A file that can't be read is an error.
func (o Options) credentials() (auth.CredentialFunc, error) {
	var stores []credentials.Store
	for _, path := range credentialFiles() {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			continue // also a folder of another user
		}
		var s credentials.Store
		var err error
		if o.Helpers {
			s, err = credentials.NewStore(path, credentials.StoreOptions{})
		} else {
			s, err = credentials.NewFileStore(path)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: credentials can't be read from it", path) // the error may quote it
		}
		stores = append(stores, s)
	}
	return func(ctx context.Context, host string) (auth.Credential, error) {
		for _, s := range stores {
			c, err := s.Get(ctx, credentials.ServerAddressFromHostname(host))
			if err != nil {
				return auth.EmptyCredential, fmt.Errorf("%w: the credentials of %s can't be read", errFinal, host)
			}
			if c != auth.EmptyCredential {
				return c, nil
			}
		}
		return auth.EmptyCredential, nil
	}, nil
}
