package pki

import (
	"encoding/base64"
	"fmt"
	"os"

	"isthmus.dev/kube/datadir"
)

// WriteKubeconfig writes a client's kubeconfig with everything in it, so that it can
// be copied to another host.
func (s *Store) WriteKubeconfig(path, client, server string) error {
	var encoded [3]string
	for i, file := range []string{s.Cert(Authority), s.Cert(client), s.Key(client)} {
		b, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("kubeconfig of %s: %w", client, err)
		}
		encoded[i] = base64.StdEncoding.EncodeToString(b)
	}
	return writeKubeconfig(path, fmt.Sprintf(kubeconfig, server,
		"certificate-authority-data: "+encoded[0],
		"client-certificate-data: "+encoded[1],
		"client-key-data: "+encoded[2]))
}

// WriteLinkedKubeconfig writes a kubeconfig that names the files instead, so that
// its client takes up renewed certificates by itself.
func (s *Store) WriteLinkedKubeconfig(path, client, server string) error {
	return writeKubeconfig(path, fmt.Sprintf(kubeconfig, server,
		fmt.Sprintf("certificate-authority: %q", s.Cert(Authority)),
		fmt.Sprintf("client-certificate: %q", s.Cert(client)),
		fmt.Sprintf("client-key: %q", s.Key(client))))
}

func writeKubeconfig(path, text string) error {
	if err := datadir.WriteFile(path, []byte(text)); err != nil {
		return fmt.Errorf("write kubeconfig: %w", err)
	}
	return nil
}

const kubeconfig = `apiVersion: v1
kind: Config
clusters:
- name: isthmus
  cluster:
    server: %q
    %s
users:
- name: isthmus
  user:
    %s
    %s
contexts:
- name: isthmus
  context:
    cluster: isthmus
    user: isthmus
current-context: isthmus
`
