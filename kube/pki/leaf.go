package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"slices"
	"time"
)

// leaf is a certificate to issue: of the server if it has names, else of a client.
type leaf struct {
	name   string
	user   string
	groups []string
	server *Names
}

func leaves(server Names) []leaf {
	return []leaf{
		{name: Server, user: "kube-apiserver", server: &server},
		{name: Admin, user: "isthmus:admin", groups: []string{"system:masters"}},
		{name: Controller, user: "system:kube-controller-manager"},
	}
}

func (s *Store) ensureLeaf(ca authority, l leaf) error {
	cert, err := readCert(s.Cert(l.name))
	if err == nil && s.keeps(ca, l, cert) {
		return nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := s.sign(ca, l, key)
	if err != nil {
		return err
	}
	// The key goes first: a crash between the two leaves a pair that keeps refuses.
	if err := writeKey(s.Key(l.name), key); err != nil {
		return err
	}
	return writePEM(s.Cert(l.name), "CERTIFICATE", der)
}

// keeps says whether a certificate still serves for what it should.
func (s *Store) keeps(ca authority, l leaf, cert *x509.Certificate) bool {
	key, err := readKey(s.Key(l.name))
	if err != nil || !key.PublicKey.Equal(cert.PublicKey) || cert.CheckSignatureFrom(ca.cert) != nil {
		return false
	}
	if s.now().Add(min(renewBefore, ca.cert.NotAfter.Sub(s.now())/3)).After(cert.NotAfter) {
		return false
	}
	if cert.Subject.CommonName != l.user || !slices.Equal(cert.Subject.Organization, l.groups) {
		return false
	}
	return l.server == nil || covers(cert, *l.server)
}

func covers(cert *x509.Certificate, names Names) bool {
	for _, ip := range names.IPs {
		if !slices.ContainsFunc(cert.IPAddresses, ip.Equal) {
			return false
		}
	}
	for _, dns := range names.DNS {
		if !slices.Contains(cert.DNSNames, dns) {
			return false
		}
	}
	return true
}

func (s *Store) sign(ca authority, l leaf, key *ecdsa.PrivateKey) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	ends := s.now().Add(leafLife)
	if ends.After(ca.cert.NotAfter) {
		ends = ca.cert.NotAfter
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: l.user, Organization: l.groups},
		NotBefore:    s.now().Add(-backdate),
		NotAfter:     ends,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if l.server != nil {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		template.DNSNames = l.server.DNS
		template.IPAddresses = l.server.IPs
	}
	return x509.CreateCertificate(rand.Reader, template, ca.cert, &key.PublicKey, ca.key)
}

func selfSign(key *ecdsa.PrivateKey, now time.Time) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "isthmus-kube"},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
	}
	return x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
}

// ServerNames are the names of a server that binds and advertises these addresses,
// whose service `kubernetes` has the address service.
func ServerNames(bind, advertise, service net.IP, extra []string) Names {
	n := Names{
		DNS: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		IPs: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback, service},
	}
	for _, ip := range []net.IP{bind, advertise} {
		n.addIP(ip)
	}
	for _, name := range extra {
		if ip := net.ParseIP(name); ip != nil {
			n.addIP(ip)
		} else if !slices.Contains(n.DNS, name) {
			n.DNS = append(n.DNS, name)
		}
	}
	return n
}

func (n *Names) addIP(ip net.IP) {
	if ip != nil && !ip.IsUnspecified() && !slices.ContainsFunc(n.IPs, ip.Equal) {
		n.IPs = append(n.IPs, ip)
	}
}
