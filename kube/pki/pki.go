// Package pki keeps the keys and certificates of the embedded Kubernetes API in its
// data directory: a certificate authority of ten years, the key that signs service
// account tokens, and leaves of one year that are issued again before they end or
// when the server's addresses change. `Ensure` runs at every start and once a day.
//
// Authority and SigningKey are what a snapshot must hold: with them every
// kubeconfig and token issued before stays valid. Leaves can always be made anew.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"isthmus.dev/kube/datadir"
)

// Names of the files, without what .crt and .key add.
const (
	Authority  = "ca"
	SigningKey = "sa" // of service account tokens: a key, no certificate
	Server     = "apiserver"
	Admin      = "admin"
	Controller = "controller-manager"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	leafLife      = 365 * 24 * time.Hour
	renewBefore   = leafLife / 3
	backdate      = time.Hour // for clients whose clocks are behind
)

// Durable is every file that can't be made anew: what a snapshot holds.
func Durable() []string {
	return []string{Authority + ".crt", Authority + ".key", SigningKey + ".key"}
}

// Store is the folder of the keys and certificates.
type Store struct {
	dir string
	now func() time.Time
}

// Open is the store in dir, by the clock now.
func Open(dir string, now func() time.Time) *Store { return &Store{dir: dir, now: now} }

// Cert and Key are paths of a name's files.
func (s *Store) Cert(name string) string { return filepath.Join(s.dir, name+".crt") }
func (s *Store) Key(name string) string  { return filepath.Join(s.dir, name+".key") }

// Names are what clients may call the server.
type Names struct {
	DNS []string
	IPs []net.IP
}

// Ensure makes what is missing and renews what is due. It gives the authority's
// end, for the caller to warn of.
func (s *Store) Ensure(server Names) (authorityEnds time.Time, err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return time.Time{}, fmt.Errorf("make PKI folder: %w", err)
	}
	ca, err := s.ensureAuthority()
	if err != nil {
		return time.Time{}, err
	}
	if _, err := s.ensureKey(SigningKey); err != nil {
		return time.Time{}, err
	}
	for _, l := range leaves(server) {
		if err := s.ensureLeaf(ca, l); err != nil {
			return time.Time{}, fmt.Errorf("certificate %s: %w", s.Cert(l.name), err)
		}
	}
	return ca.cert.NotAfter, nil
}

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (s *Store) ensureAuthority() (authority, error) {
	cert, err := readCert(s.Cert(Authority))
	if errors.Is(err, fs.ErrNotExist) {
		return s.newAuthority()
	}
	if err != nil {
		return authority{}, err
	}
	key, err := readKey(s.Key(Authority))
	if err != nil {
		return authority{}, err
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return authority{}, fmt.Errorf("%s and %s don't belong together: restore both from one snapshot", s.Cert(Authority), s.Key(Authority))
	}
	if !s.now().Before(cert.NotAfter) {
		return authority{}, fmt.Errorf("certificate authority %s ended on %s: move it away to have a new one made; clients then need the new kubeconfig",
			s.Cert(Authority), cert.NotAfter.Format(time.DateOnly))
	}
	return authority{cert, key}, nil
}

func (s *Store) newAuthority() (authority, error) {
	key, err := s.ensureKey(Authority)
	if err != nil {
		return authority{}, err
	}
	der, err := selfSign(key, s.now())
	if err != nil {
		return authority{}, fmt.Errorf("sign certificate authority: %w", err)
	}
	if err := writePEM(s.Cert(Authority), "CERTIFICATE", der); err != nil {
		return authority{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return authority{cert, key}, err
}

func (s *Store) ensureKey(name string) (*ecdsa.PrivateKey, error) {
	key, err := readKey(s.Key(name))
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate %s: %w", s.Key(name), err)
	}
	return key, writeKey(s.Key(name), key)
}

func readKey(path string) (*ecdsa.PrivateKey, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s: no PEM block in it: restore it from a snapshot", path)
	}
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, os.Chmod(path, 0o600)
}

func readCert(path string) (*x509.Certificate, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read certificate: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s: no PEM block in it", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return cert, nil
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	return writePEM(path, "EC PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	if err := datadir.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
