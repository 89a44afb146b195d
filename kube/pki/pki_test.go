package pki

import (
	"bytes"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// clock is a time that tests move.
type clock struct{ at time.Time }

func (c *clock) now() time.Time { return c.at }

func newStore(t *testing.T) (*Store, *clock) {
	t.Helper()
	c := &clock{at: time.Date(2026, 11, 21, 4, 0, 0, 0, time.UTC)}
	return Open(filepath.Join(t.TempDir(), "pki"), c.now), c
}

func names(advertise string) Names {
	return ServerNames(net.IPv4(127, 0, 0, 1), net.ParseIP(advertise), net.IPv4(10, 96, 0, 1), []string{"kube.example.org", "192.0.2.9"})
}

func ensure(t *testing.T, s *Store, n Names) {
	t.Helper()
	if _, err := s.Ensure(n); err != nil {
		t.Fatal(err)
	}
}

// contents of all files, by name.
func contents(t *testing.T, s *Store) map[string]string {
	t.Helper()
	all := map[string]string{}
	files, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(s.dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all[f.Name()] = string(b)
	}
	return all
}

func TestEnsureMakesAll(t *testing.T) {
	s, c := newStore(t)
	ends, err := s.Ensure(names("192.0.2.1"))
	if err != nil {
		t.Fatal(err)
	}
	if want := c.at.Add(authorityLife); !ends.Equal(want) {
		t.Errorf("authority ends %s, want %s", ends, want)
	}
	ca, err := readCert(s.Cert(Authority))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	tests := map[string]struct {
		usage x509.ExtKeyUsage
		user  string
		group string
		names []string
	}{
		Server:     {x509.ExtKeyUsageServerAuth, "kube-apiserver", "", []string{"localhost", "127.0.0.1", "[::1]", "192.0.2.1", "10.96.0.1", "kube.example.org", "192.0.2.9", "kubernetes.default.svc"}},
		Admin:      {x509.ExtKeyUsageClientAuth, "isthmus:admin", "system:masters", nil},
		Controller: {x509.ExtKeyUsageClientAuth, "system:kube-controller-manager", "", nil},
	}
	for name, tt := range tests {
		cert, err := readCert(s.Cert(name))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: c.at, KeyUsages: []x509.ExtKeyUsage{tt.usage}}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if cert.Subject.CommonName != tt.user || strings.Join(cert.Subject.Organization, ",") != tt.group {
			t.Errorf("%s is for %s", name, cert.Subject)
		}
		for _, n := range tt.names {
			if err := cert.VerifyHostname(n); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	for name := range contents(t, s) {
		st, err := os.Stat(filepath.Join(s.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o, want 600", name, st.Mode().Perm())
		}
	}
	for _, name := range Durable() {
		if _, err := os.Stat(filepath.Join(s.dir, name)); err != nil {
			t.Errorf("a snapshot would lack %s: %v", name, err)
		}
	}
}

func TestEnsureRenews(t *testing.T) {
	tests := map[string]struct {
		later   time.Duration
		change  func(*testing.T, *Store)
		names   string
		renewed []string
	}{
		"nothing":            {names: "192.0.2.1"},
		"half a year":        {later: leafLife / 2, names: "192.0.2.1"},
		"near the end":       {later: leafLife - renewBefore + time.Hour, names: "192.0.2.1", renewed: []string{Server, Admin, Controller}},
		"after the end":      {later: leafLife + time.Hour, names: "192.0.2.1", renewed: []string{Server, Admin, Controller}},
		"another address":    {names: "192.0.2.2", renewed: []string{Server}},
		"certificate gone":   {names: "192.0.2.1", change: func(t *testing.T, s *Store) { remove(t, s.Cert(Admin)) }, renewed: []string{Admin}},
		"key gone":           {names: "192.0.2.1", change: func(t *testing.T, s *Store) { remove(t, s.Key(Admin)) }, renewed: []string{Admin}},
		"certificate harmed": {names: "192.0.2.1", change: func(t *testing.T, s *Store) { write(t, s.Cert(Server), "no PEM") }, renewed: []string{Server}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s, c := newStore(t)
			ensure(t, s, names("192.0.2.1"))
			before := contents(t, s)
			c.at = c.at.Add(tt.later)
			if tt.change != nil {
				tt.change(t, s)
			}
			ensure(t, s, names(tt.names))
			after := contents(t, s)
			want := map[string]bool{}
			for _, r := range tt.renewed {
				want[r+".crt"], want[r+".key"] = true, true
			}
			for file := range after {
				if (before[file] != after[file]) != want[file] {
					t.Errorf("%s renewed: %t, want %t", file, before[file] != after[file], want[file])
				}
			}
			for name, text := range after {
				if name, ok := strings.CutSuffix(name, ".crt"); ok && name != Authority {
					cert, err := readCert(s.Cert(name))
					if err != nil || !c.at.Before(cert.NotAfter) {
						t.Errorf("%s is of no use (%v): %s", name, err, text)
					}
				}
			}
		})
	}
}

func TestEnsureRefuses(t *testing.T) {
	tests := map[string]struct {
		later  time.Duration
		change func(*testing.T, *Store)
		says   string
	}{
		"authority ended":      {authorityLife + time.Hour, nil, "ended on 2036-11-18"},
		"authority's key gone": {0, func(t *testing.T, s *Store) { remove(t, s.Key(Authority)) }, "read key"},
		"another's key":        {0, func(t *testing.T, s *Store) { copyFile(t, s.Key(SigningKey), s.Key(Authority)) }, "don't belong together"},
		"signing key harmed":   {0, func(t *testing.T, s *Store) { write(t, s.Key(SigningKey), "no PEM") }, "no PEM block"},
		"authority's harmed":   {0, func(t *testing.T, s *Store) { write(t, s.Cert(Authority), "no PEM") }, "no PEM block"},
		"signing key cut short": {0, func(t *testing.T, s *Store) {
			write(t, s.Key(SigningKey), "-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n")
		}, "sa.key"},
		"authority's, cut short": {0, func(t *testing.T, s *Store) {
			write(t, s.Cert(Authority), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
		}, "ca.crt"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s, c := newStore(t)
			ensure(t, s, names("192.0.2.1"))
			c.at = c.at.Add(tt.later)
			if tt.change != nil {
				tt.change(t, s)
			}
			before := contents(t, s)
			if _, err := s.Ensure(names("192.0.2.1")); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("error %v, want one with %q", err, tt.says)
			}
			for file, text := range contents(t, s) {
				if before[file] != text {
					t.Errorf("%s was changed nevertheless", file)
				}
			}
		})
	}
}

func TestLeafEndsWithItsAuthority(t *testing.T) {
	s, c := newStore(t)
	ensure(t, s, names("192.0.2.1"))
	c.at = c.at.Add(authorityLife - 30*24*time.Hour)
	ensure(t, s, names("192.0.2.1"))
	before := contents(t, s)
	ensure(t, s, names("192.0.2.1"))
	for file, text := range contents(t, s) {
		if before[file] != text {
			t.Errorf("%s is renewed at every start in the authority's last days", file)
		}
	}
	cert, err := readCert(s.Cert(Server))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := readCert(s.Cert(Authority))
	if err != nil {
		t.Fatal(err)
	}
	if !cert.NotAfter.Equal(ca.NotAfter) {
		t.Errorf("the leaf ends %s, its authority %s", cert.NotAfter, ca.NotAfter)
	}
}

func TestKubeconfigs(t *testing.T) {
	s, _ := newStore(t)
	ensure(t, s, names("192.0.2.1"))
	for name, write := range map[string]func(path, client, server string) error{"whole": s.WriteKubeconfig, "linked": s.WriteLinkedKubeconfig} {
		path := filepath.Join(t.TempDir(), name)
		if err := write(path, Admin, "https://127.0.0.1:6443"); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(b, []byte(`server: "https://127.0.0.1:6443"`)) {
			t.Errorf("%s: no server in\n%s", name, b)
		}
		if linked := bytes.Contains(b, []byte(s.Key(Admin))); linked != (name == "linked") {
			t.Errorf("%s names the key's file: %t", name, linked)
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o, want 600", name, st.Mode().Perm())
		}
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	write(t, to, string(b))
}
