package identity

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
)

// file holds the key, the chain and the roots together, so that one rename
// replaces all of them or nothing.
const file = "identity.pem"

// rootType marks a certificate of the trust bundle.
const rootType = "TRUSTED CERTIFICATE"

// Save writes the identity, readable by its owner alone.
func Save(dir string, id *Identity) error {
	key, err := id.KeyPEM()
	if err != nil {
		return err
	}
	b := bytes.NewBuffer(key)
	b.Write(EncodeCertificates(id.Chain))
	for _, c := range id.Roots {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: rootType, Bytes: c.Raw}))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return WriteFile(filepath.Join(dir, file), b.Bytes(), 0o600)
}

// Load reads what Save wrote; os.ErrNotExist where there is none.
func Load(dir string) (*Identity, error) {
	path := filepath.Join(dir, file)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var key crypto.Signer
	var chain, roots []*x509.Certificate
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type == "PRIVATE KEY" {
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("%s: private key: %w", path, err)
			}
			key, _ = k.(crypto.Signer)
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if block.Type == rootType {
			roots = append(roots, c)
		} else {
			chain = append(chain, c)
		}
	}
	if key == nil || len(roots) == 0 {
		return nil, fmt.Errorf("%s is damaged: remove it and join again", path)
	}
	id, err := New(key, chain, roots)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return id, nil
}

// WriteFile replaces a file atomically and durably.
func WriteFile(path string, content []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once renamed
	err = f.Chmod(mode)
	if err == nil {
		_, err = f.Write(content)
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if d, err := os.Open(filepath.Dir(path)); err == nil {
		_ = d.Sync() // not every filesystem can
		_ = d.Close()
	}
	return nil
}
