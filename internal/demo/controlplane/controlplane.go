// Package controlplane runs isthmusd --standalone on a machine of the demo's kind,
// and reaches its Kubernetes API from outside. internal/demo and internal/bench
// start their meshes with it.
package controlplane

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	istio "istio.io/client-go/pkg/clientset/versioned"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	controlv1 "isthmus.dev/api/control/v1"
	"isthmus.dev/internal/attest/token/jointoken"
	"isthmus.dev/internal/demo/machine"
	"isthmus.dev/internal/enroll/invite"
	"isthmus.dev/internal/kubeapi"
)

// InstallDir is where every machine has the binaries (machine.Options.Bin).
const InstallDir = "/opt/isthmus"

// KubeAPI is the Kubernetes API's address on the machine.
const KubeAPI = "127.0.0.1:16443"

const (
	startLimit = 60 * time.Second // until isthmusd serves
	endLimit   = 10 * time.Second // until what it started has ended, too
)

// ControlPlane is isthmusd on its machine.
type ControlPlane struct {
	Machine *machine.Machine
	// Rest and Clients reach the Kubernetes API.
	Rest    *rest.Config
	Clients invite.Clients
	// Server is isthmusd's address; Bundle are the CA certificates to know it by.
	Server string
	Bundle []byte

	kubeconfig string // its path on the machine
	cmd        *exec.Cmd
	ended      chan struct{}
}

// Start starts isthmusd and returns when it serves. Its log goes to a file.
func Start(ctx context.Context, m *machine.Machine, log *os.File) (*ControlPlane, error) {
	c := &ControlPlane{Machine: m, ended: make(chan struct{})}
	c.cmd = exec.Command(InstallDir+"/isthmusd", "--standalone", "--advertise", m.Address.String())
	c.cmd.Env, c.cmd.Dir, c.cmd.Stderr = machine.Env(), "/", log
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := m.Start(c.cmd); err != nil {
		return nil, fmt.Errorf("start isthmusd: %w", err)
	}
	serves := make(chan string, 1)
	go func() {
		defer close(c.ended)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			if path, ok := strings.CutPrefix(s.Text(), "export KUBECONFIG="); ok {
				serves <- path
			}
		}
		_ = c.cmd.Wait()
	}()
	select {
	case c.kubeconfig = <-serves:
		return c, c.connect(ctx)
	case <-c.ended:
		return nil, fmt.Errorf("isthmusd ended: %s", c.cmd.ProcessState)
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(startLimit):
		return nil, fmt.Errorf("isthmusd does not serve after %s", startLimit)
	}
}

// Kill ends isthmusd as a crash would, and waits until its Kubernetes API is gone,
// so that Start may follow on the same machine.
func (c *ControlPlane) Kill(ctx context.Context) error {
	if err := c.cmd.Process.Kill(); err != nil {
		return err
	}
	<-c.ended
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	for _, a := range []string{KubeAPI, c.Server} {
		for {
			conn, err := c.Machine.Dial(ctx, "tcp", a)
			if ctx.Err() != nil {
				return fmt.Errorf("isthmusd was killed, and %s still listens", a)
			}
			if err != nil {
				break
			}
			conn.Close()
			time.Sleep(50 * time.Millisecond)
		}
	}
	return nil
}

func (c *ControlPlane) connect(ctx context.Context) error {
	var err error
	if c.Rest, err = c.config(); err != nil {
		return err
	}
	if c.Clients.Kube, err = kubernetes.NewForConfig(c.Rest); err != nil {
		return err
	}
	if c.Clients.Istio, err = istio.NewForConfig(c.Rest); err != nil {
		return err
	}
	d, err := dynamic.NewForConfig(c.Rest)
	if err != nil {
		return err
	}
	c.Clients.Tokens = &jointoken.Store{Client: d}
	cm, err := c.Clients.Kube.CoreV1().ConfigMaps(kubeapi.RootNamespace).Get(ctx, controlv1.ServerConfigMap, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("find isthmusd: %w", err)
	}
	c.Server, c.Bundle = cm.Data[controlv1.AddressKey], []byte(cm.Data[controlv1.BundleKey])
	return nil
}

// config reaches the Kubernetes API from inside its machine.
func (c *ControlPlane) config() (*rest.Config, error) {
	text, err := c.Machine.ReadFile(c.kubeconfig)
	if err != nil {
		return nil, err
	}
	parsed, err := clientcmd.Load(text)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig of isthmusd: %w", err)
	}
	// Files are named as that machine sees them.
	for _, u := range parsed.AuthInfos {
		if err := errors.Join(c.embed(&u.ClientCertificate, &u.ClientCertificateData), c.embed(&u.ClientKey, &u.ClientKeyData)); err != nil {
			return nil, err
		}
	}
	for _, cl := range parsed.Clusters {
		if err := c.embed(&cl.CertificateAuthority, &cl.CertificateAuthorityData); err != nil {
			return nil, err
		}
	}
	cfg, err := clientcmd.NewDefaultClientConfig(*parsed, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("kubeconfig of isthmusd: %w", err)
	}
	cfg.Dial, cfg.QPS, cfg.Burst = c.Machine.Dial, 100, 200
	return cfg, nil
}

func (c *ControlPlane) embed(path *string, data *[]byte) error {
	if *path == "" {
		return nil
	}
	name := *path
	if !filepath.IsAbs(name) {
		name = filepath.Join(filepath.Dir(c.kubeconfig), name)
	}
	b, err := c.Machine.ReadFile(name)
	if err != nil {
		return fmt.Errorf("kubeconfig of isthmusd: %w", err)
	}
	*path, *data = "", b
	return nil
}
