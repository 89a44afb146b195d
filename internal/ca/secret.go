package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Secrets that hold the authority, as Istio's.
const (
	PluggedSecret   = "cacerts"
	GeneratedSecret = "istio-ca-secret"

	generatedType = corev1.SecretType("istio.io/ca-root")
)

// secretKeys names what a Secret holds.
type secretKeys struct{ cert, key, chain, root string }

var (
	istioKeys = secretKeys{cert: "ca-cert.pem", key: "ca-key.pem", chain: "cert-chain.pem", root: "root-cert.pem"}
	tlsKeys   = secretKeys{cert: "tls.crt", key: "tls.key", root: "ca.crt"} // cert-manager's form
)

// Options of Open.
type Options struct {
	Namespace   string // of the Secrets; default istio-system
	TrustDomain string
	// MaxLifetime is the longest that a workload may ask for; default 24 h.
	MaxLifetime time.Duration
	Now         func() time.Time
}

// Open takes the authority that is plugged in (cacerts), else the one that was
// made before (istio-ca-secret), else makes one. Replicas that start at once agree
// on whichever was created first.
func Open(ctx context.Context, client kubernetes.Interface, o Options) (*Authority, error) {
	if o.Namespace == "" {
		o.Namespace = "istio-system"
	}
	if o.MaxLifetime <= 0 {
		o.MaxLifetime = DefaultLifetime
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	s := &secrets{client: client, namespace: o.Namespace, trustDomain: o.TrustDomain, now: o.Now}
	a := &Authority{maxLifetime: o.MaxLifetime, now: o.Now, reload: s.load}
	k, err := s.load(ctx)
	if err != nil {
		return nil, err
	}
	a.current.Store(k)
	return a, nil
}

type secrets struct {
	client      kubernetes.Interface
	namespace   string
	trustDomain string
	now         func() time.Time
}

func (s *secrets) load(ctx context.Context) (*keyPair, error) {
	secret, err := s.get(ctx, PluggedSecret)
	if apierrors.IsNotFound(err) {
		secret, err = s.get(ctx, GeneratedSecret)
	}
	if apierrors.IsNotFound(err) {
		secret, err = s.generate(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	k, err := parseSecret(secret, s.now())
	if err != nil {
		return nil, fmt.Errorf("certificate authority in Secret %s/%s: %w", secret.Namespace, secret.Name, err)
	}
	return k, nil
}

func (s *secrets) get(ctx context.Context, name string) (*corev1.Secret, error) {
	return s.client.CoreV1().Secrets(s.namespace).Get(ctx, name, metav1.GetOptions{})
}

// generate creates the Secret, unless another replica was first: then it takes
// the other's.
func (s *secrets) generate(ctx context.Context) (*corev1.Secret, error) {
	cert, key, err := newRoot(s.trustDomain, s.now())
	if err != nil {
		return nil, err
	}
	secret, err := s.client.CoreV1().Secrets(s.namespace).Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: GeneratedSecret},
		Type:       generatedType,
		Data: map[string][]byte{
			istioKeys.cert: cert, istioKeys.key: key, istioKeys.root: cert, istioKeys.chain: {},
		},
	}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return s.get(ctx, GeneratedSecret)
	}
	return secret, err
}

// parseSecret checks that the parts belong together, so that a mistake is told at
// the start and not by every workload.
func parseSecret(secret *corev1.Secret, now time.Time) (*keyPair, error) {
	keys := istioKeys
	if len(secret.Data[keys.cert]) == 0 && len(secret.Data[tlsKeys.cert]) != 0 {
		keys = tlsKeys
	}
	certs, err := parseCertificates(secret.Data, keys.cert, true)
	if err != nil {
		return nil, err
	}
	chain, err := parseCertificates(secret.Data, keys.chain, false)
	if err != nil {
		return nil, err
	}
	cert := certs[0]
	selfSigned := bytes.Equal(cert.RawIssuer, cert.RawSubject) && cert.CheckSignatureFrom(cert) == nil
	roots, err := parseCertificates(secret.Data, keys.root, !selfSigned)
	if err != nil {
		return nil, err
	}
	if len(roots) == 0 {
		roots = []*x509.Certificate{cert}
	}
	key, err := parseKey(secret.Data[keys.key])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keys.key, err)
	}
	k := &keyPair{origin: secret.Namespace + "/" + secret.Name, key: key, cert: cert, bundle: newBundle(roots)}
	if err := k.check(append(certs[1:], chain...), now); err != nil {
		return nil, err
	}
	return k, nil
}

// check verifies the signing certificate and keeps the intermediates that lead
// from it to a root.
func (k *keyPair) check(others []*x509.Certificate, now time.Time) error {
	public, ok := k.cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(k.key.Public()) {
		return errors.New("the private key is not the certificate's; store the two that belong together")
	}
	if !k.cert.IsCA || (k.cert.KeyUsage != 0 && k.cert.KeyUsage&x509.KeyUsageCertSign == 0) {
		return errors.New("the certificate may not sign others; it needs CA:TRUE and keyCertSign")
	}
	pool := x509.NewCertPool()
	for _, c := range others {
		pool.AddCert(c)
	}
	chains, err := k.cert.Verify(x509.VerifyOptions{
		Roots: k.bundle.Pool, Intermediates: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return fmt.Errorf("no chain from the certificate to %s; renew it, or complete %s: %w", istioKeys.root, istioKeys.chain, err)
	}
	k.intermediates = chains[0][:len(chains[0])-1]
	return nil
}

func parseCertificates(data map[string][]byte, name string, required bool) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for rest := data[name]; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != certificateBlock {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, c)
	}
	if required && len(out) == 0 {
		return nil, fmt.Errorf("%s holds no certificate in PEM", name)
	}
	return out, nil
}

func parseKey(text []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("no private key in PEM")
	}
	var key any
	var err error
	switch block.Type {
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T cannot sign", key)
	}
	return signer, nil
}
