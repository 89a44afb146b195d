package demo

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"isthmus.dev/internal/demo/controlplane"
	"isthmus.dev/internal/demo/machine"
)

// forward is a port of this host that leads into the machines' network: a
// visitor's way to the page, and a person's to the Kubernetes API.
type forward struct{ listener net.Listener }

// openForward pipes each connection to address into the machine, and from there to
// target.
func openForward(address string, m *machine.Machine, target string) (*forward, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	f := &forward{listener: l}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go pipe(c, m, target)
		}
	}()
	return f, nil
}

func (f *forward) address() string { return f.listener.Addr().String() }

// close ends the listener; connections end with the machine.
func (f *forward) close() { f.listener.Close() }

func pipe(c net.Conn, m *machine.Machine, target string) {
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	to, err := m.Dial(ctx, "tcp", target)
	if err != nil {
		return
	}
	defer to.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(to, c)
		_ = to.(*net.TCPConn).CloseWrite()
	}()
	_, _ = io.Copy(c, to)
	c.Close()
	<-done
}

// openControl makes a kubeconfig by which a person on this host looks into the
// mesh, and gives isthmusd's address on it.
func (w *world) openControl() (kubeconfig, server string, err error) {
	api, err := openForward("127.0.0.1:0", w.host, controlplane.KubeAPI)
	if err != nil {
		return "", "", err
	}
	w.stop = append(w.stop, api.close)
	main, err := openForward("127.0.0.1:0", w.host, w.server)
	if err != nil {
		return "", "", err
	}
	w.stop = append(w.stop, main.close)
	c := clientcmdapi.NewConfig()
	c.Clusters["demo"] = &clientcmdapi.Cluster{Server: "https://" + api.address(), CertificateAuthorityData: w.rest.CAData}
	c.AuthInfos["demo"] = &clientcmdapi.AuthInfo{ClientCertificateData: w.rest.CertData, ClientKeyData: w.rest.KeyData}
	c.Contexts["demo"] = &clientcmdapi.Context{Cluster: "demo", AuthInfo: "demo", Namespace: namespace}
	c.CurrentContext = "demo"
	kubeconfig = filepath.Join(w.dir, "kubeconfig")
	if err := clientcmd.WriteToFile(*c, kubeconfig); err != nil {
		return "", "", fmt.Errorf("write a kubeconfig: %w", err)
	}
	return kubeconfig, main.address(), os.Chmod(kubeconfig, 0o600)
}
