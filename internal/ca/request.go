package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"

	"google.golang.org/grpc/codes"

	"isthmus.dev/internal/attest"
)

const (
	maxRequestSize = 16 << 10
	minRSABits     = 2048
	maxRSABits     = 4096
	minRSAExponent = 65537
)

// Request is a certificate signing request whose signature proved that the asker
// holds the key. Nothing else of it is kept: names come from what was proved.
type Request struct {
	PublicKey any
	KeyID     attest.KeyID
}

// ParseRequest reads one PEM block of PKCS #10 and checks key and signature. It
// refuses with a *attest.Refusal.
func ParseRequest(text []byte) (*Request, error) {
	if len(text) > maxRequestSize {
		return nil, refuseRequest(fmt.Sprintf("has %d bytes, more than %d", len(text), maxRequestSize))
	}
	block, rest := pem.Decode(text)
	if block == nil || len(bytes.TrimSpace(rest)) != 0 || (block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST") {
		return nil, refuseRequest("is not one PEM block of type CERTIFICATE REQUEST")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, refuseRequest("cannot be read: " + err.Error())
	}
	// The key before the signature: checking a signature with a huge key is work.
	if err := checkKey(csr.PublicKey); err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, refuseRequest("is not signed by its own key: " + err.Error())
	}
	id, err := attest.KeyIDOf(csr.PublicKey)
	if err != nil {
		return nil, refuseRequest("has a key that cannot be encoded: " + err.Error())
	}
	return &Request{PublicKey: csr.PublicKey, KeyID: id}, nil
}

// checkKey takes what Envoy can serve TLS with by default.
func checkKey(public any) error {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return refuseRequest("has a key on the curve " + k.Curve.Params().Name)
		}
	case *rsa.PublicKey:
		bits := k.N.BitLen()
		if bits < minRSABits || bits > maxRSABits || k.E < minRSAExponent || k.E%2 == 0 {
			return refuseRequest(fmt.Sprintf("has an RSA key of %d bits and exponent %d", bits, k.E))
		}
	default:
		return refuseRequest(fmt.Sprintf("has a key of type %T", public))
	}
	return nil
}

func refuseRequest(what string) error {
	return attest.Refuse(codes.InvalidArgument, "CSR_REFUSED", "the certificate request "+what,
		"send a PEM PKCS #10 request with an ECDSA key (P-256, P-384) or an RSA key of 2048 to 4096 bits")
}
