package attest

import (
	"crypto/x509/pkix"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Identity gives the SPIFFE id of a service account:
// spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT.
func Identity(trustDomain, namespace, serviceAccount string) (spiffeid.ID, error) {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("trust domain %q: %w", trustDomain, err)
	}
	id, err := spiffeid.FromSegments(td, "ns", namespace, "sa", serviceAccount)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("service account %q of namespace %q: %w", serviceAccount, namespace, err)
	}
	return id, nil
}

// ServiceAccount gives the namespace and the account of an id of that form.
func ServiceAccount(id spiffeid.ID) (namespace, account string, ok bool) {
	s := strings.Split(id.Path(), "/")
	if len(s) != 5 || s[0] != "" || s[1] != "ns" || s[3] != "sa" {
		return "", "", false
	}
	return s[2], s[4], true
}

// Instance is which workload of an identity a certificate was given to. A SPIFFE
// id names a service account, which many workloads share; without the instance
// one of them could act for another, and a machine that was removed could come
// back as any of them.
//
// It is carried in the subject, which a SPIFFE certificate may fill freely, and
// survives renewal.
type Instance struct {
	Kind Kind
	Name string
	UID  string // tells a workload from a later one of the same name
}

// Subject writes the instance into a certificate's subject. Names of objects can
// be longer than the 64 characters that X.520 recommends for a common name;
// TLS libraries don't mind.
func (i Instance) Subject() pkix.Name {
	if i.Kind == Unknown || i.Name == "" || i.UID == "" {
		return pkix.Name{}
	}
	return pkix.Name{OrganizationalUnit: []string{i.Kind.String()}, CommonName: i.Name, SerialNumber: i.UID}
}

// InstanceOf reads it back; the zero Instance where there is none.
func InstanceOf(subject pkix.Name) Instance {
	if len(subject.OrganizationalUnit) != 1 || subject.CommonName == "" || subject.SerialNumber == "" {
		return Instance{}
	}
	for kind, name := range kindNames {
		if name != "" && name == subject.OrganizationalUnit[0] {
			return Instance{Kind: Kind(kind), Name: subject.CommonName, UID: subject.SerialNumber}
		}
	}
	return Instance{}
}
