package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/demo/machine"
)

// volumes is where a pod's volumes are in its machine; they are bound from there
// to the paths where containers mount them.
const volumes = "/.pod/volumes"

// mount fills the volumes and binds them.
func (p *pod) mount(ctx context.Context) error {
	m := p.machine.Load()
	for _, v := range p.obj.Spec.Volumes {
		dir := filepath.Join(m.Root, volumes, v.Name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.Chmod(dir, 0o777); err != nil { // any container's user may write
			return err
		}
		if err := retry(ctx, func() error { return p.fill(ctx, v, dir) }); err != nil {
			return fmt.Errorf("volume %s: %w", v.Name, err)
		}
	}
	mounted := map[string]bool{}
	all := append(append([]corev1.Container{}, p.obj.Spec.InitContainers...), p.obj.Spec.Containers...)
	for _, c := range all {
		for _, vm := range c.VolumeMounts {
			if mounted[vm.MountPath] {
				continue
			}
			mounted[vm.MountPath] = true
			if err := p.bind(m, vm); err != nil {
				return fmt.Errorf("mount %s at %s: %w", vm.Name, vm.MountPath, err)
			}
		}
	}
	return nil
}

func (p *pod) bind(m *machine.Machine, vm corev1.VolumeMount) error {
	return m.InsideAll(func() error {
		if err := os.MkdirAll(vm.MountPath, 0o755); err != nil {
			return err
		}
		return unix.Mount(filepath.Join(volumes, vm.Name, vm.SubPath), vm.MountPath, "", unix.MS_BIND, "")
	})
}

func (p *pod) fill(ctx context.Context, v corev1.Volume, dir string) error {
	switch {
	case v.EmptyDir != nil:
		return nil
	case v.ConfigMap != nil:
		return p.configMap(ctx, v.ConfigMap.Name, v.ConfigMap.Items, dir)
	case v.DownwardAPI != nil:
		return p.downward(v.DownwardAPI.Items, dir)
	case v.Projected != nil:
		for _, s := range v.Projected.Sources {
			var err error
			switch {
			case s.ServiceAccountToken != nil:
				err = p.token(ctx, s.ServiceAccountToken, dir)
			case s.ConfigMap != nil:
				err = p.configMap(ctx, s.ConfigMap.Name, s.ConfigMap.Items, dir)
			case s.DownwardAPI != nil:
				err = p.downward(s.DownwardAPI.Items, dir)
			default:
				err = errors.New("a source that this node does not know")
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	return errors.New("a kind that this node does not know: it has emptyDir, configMap, downwardAPI and projected ones")
}

func write(dir, name, content string) error {
	p := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return err
	}
	return os.WriteFile(p, []byte(content), 0o644)
}

// token asks for a service account token that is bound to this very pod.
func (p *pod) token(ctx context.Context, s *corev1.ServiceAccountTokenProjection, dir string) error {
	req := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: s.ExpirationSeconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: p.obj.Name, UID: p.obj.UID},
	}}
	if s.Audience != "" {
		req.Spec.Audiences = []string{s.Audience}
	}
	account := p.obj.Spec.ServiceAccountName
	if account == "" {
		account = "default"
	}
	got, err := p.node.Client.CoreV1().ServiceAccounts(p.obj.Namespace).CreateToken(ctx, account, req, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	return write(dir, s.Path, got.Status.Token)
}

func (p *pod) configMap(ctx context.Context, name string, items []corev1.KeyToPath, dir string) error {
	cm, err := p.node.Client.CoreV1().ConfigMaps(p.obj.Namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for k, v := range cm.Data {
		path := k
		if len(items) > 0 {
			path = ""
			for _, it := range items {
				if it.Key == k {
					path = it.Path
				}
			}
		}
		if path == "" {
			continue
		}
		if err := write(dir, path, v); err != nil {
			return err
		}
	}
	return nil
}

func (p *pod) downward(items []corev1.DownwardAPIVolumeFile, dir string) error {
	for _, it := range items {
		if it.FieldRef == nil {
			return fmt.Errorf("%s: only fieldRef is known to this node", it.Path)
		}
		v, err := p.field(it.FieldRef.FieldPath)
		if err != nil {
			return err
		}
		if err := write(dir, it.Path, v); err != nil {
			return err
		}
	}
	return nil
}

// environment of a container, with Kubernetes' $(NAME) references resolved.
func (c *container) environment() ([]string, error) {
	env := machine.Env("HOSTNAME=" + c.pod.obj.Name)
	for _, e := range c.spec.Env {
		v := e.Value
		if e.ValueFrom != nil {
			if e.ValueFrom.FieldRef == nil {
				if e.ValueFrom.ResourceFieldRef != nil {
					continue // no limits are set here
				}
				return nil, fmt.Errorf("variable %s: only fieldRef is known to this node", e.Name)
			}
			var err error
			if v, err = c.pod.field(e.ValueFrom.FieldRef.FieldPath); err != nil {
				return nil, err
			}
		}
		env = append(env, e.Name+"="+expand(v, env))
	}
	return env, nil
}

func expand(s string, env []string) string {
	for _, e := range env {
		k, v, _ := strings.Cut(e, "=")
		s = strings.ReplaceAll(s, "$("+k+")", v)
	}
	return s
}

// field answers the downward API.
func (p *pod) field(path string) (string, error) {
	o := p.obj
	switch path {
	case "metadata.name":
		return o.Name, nil
	case "metadata.namespace":
		return o.Namespace, nil
	case "metadata.uid":
		return string(o.UID), nil
	case "spec.nodeName":
		return o.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return o.Spec.ServiceAccountName, nil
	case "status.podIP", "status.podIPs", "status.hostIP":
		return p.machine.Load().Address.String(), nil
	case "metadata.labels":
		return list(o.Labels), nil
	case "metadata.annotations":
		return list(o.Annotations), nil
	}
	for prefix, m := range map[string]map[string]string{"metadata.labels": o.Labels, "metadata.annotations": o.Annotations} {
		if k, ok := strings.CutPrefix(path, prefix+"['"); ok {
			return m[strings.TrimSuffix(k, "']")], nil
		}
	}
	return "", fmt.Errorf("field %s is not known to this node", path)
}

// list is a map as the downward API writes it, sorted.
func list(m map[string]string) string {
	var lines []string
	for k, v := range m {
		lines = append(lines, fmt.Sprintf("%s=%q", k, v))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
