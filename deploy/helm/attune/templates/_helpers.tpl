{{/* The release's name in Kubernetes: short enough for what KubeRay adds, and a DNS label that begins with a letter. */}}
{{- define "attune.fullname" -}}
{{- $own := ternary .Release.Name (printf "%s-attune" .Release.Name) (contains "attune" .Release.Name) -}}
{{- $name := .Values.fullnameOverride | default $own | trunc 40 | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the name %q: KubeRay wants lower-case letters, digits and hyphens, a letter first; set fullnameOverride" $name) -}}
{{- end -}}
{{- $name -}}
{{- end }}

{{/* What selects the pods of a component: dict root, component. app.kubernetes.io/name is not among them, for KubeRay's
     head service selects by its own value of it. */}}
{{- define "attune.selector" -}}
app.kubernetes.io/part-of: attune
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Labels of an object: dict root, component. */}}
{{- define "attune.labels" -}}
{{ include "attune.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* metadata of an object: dict root, component, name, annotations (optional). */}}
{{- define "attune.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "attune.labels" . | nindent 2 }}
{{- with merge (dict) (.annotations | default dict) .root.Values.annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* metadata of a pod template: dict root, component, annotations (optional). */}}
{{- define "attune.podMetadata" -}}
labels:
  {{- include "attune.selector" . | nindent 2 }}
  {{- with .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) .root.Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "attune.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default (printf "%s-%s" .Chart.AppVersion $image.variant) }}
{{- end -}}
{{- end }}

{{- define "attune.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "attune.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end }}

{{/* What every pod has in common: dict root, group (nodeSelector, tolerations, affinity, priorityClassName, gpus). */}}
{{- define "attune.podCommon" -}}
serviceAccountName: {{ include "attune.serviceAccountName" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "attune.podSecurity" .root.Values.security | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $gpus := .group.gpus | default 0 }}
{{- with merge (dict) (.group.nodeSelector | default dict) (ternary .root.Values.gpu.nodeSelector (dict) (gt (int $gpus) 0)) }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or .group.tolerations $gpus }}
tolerations:
  {{- with .group.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- if $gpus }}
  - {key: {{ .root.Values.gpu.resource | quote }}, operator: Exists, effect: NoSchedule}
  {{- end }}
{{- end }}
{{- if and $gpus .root.Values.gpu.runtimeClassName }}
runtimeClassName: {{ .root.Values.gpu.runtimeClassName }}
{{- end }}
{{- with .group.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* Of dict runAsUser, runAsGroup, fsGroup, each a number or null. */}}
{{- define "attune.podSecurity" -}}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- with .runAsUser }}
runAsUser: {{ int64 . }}
{{- end }}
{{- with .runAsGroup }}
runAsGroup: {{ int64 . }}
{{- end }}
{{- with .fsGroup }}
fsGroup: {{ int64 . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
{{- end }}

{{- define "attune.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Requests equal limits, as Ray counts by limits: dict root, group (cpu, memory, gpus). */}}
{{- define "attune.resources" -}}
{{- $both := dict "cpu" (toString .group.cpu) "memory" .group.memory -}}
{{- if .group.gpus }}{{ $_ := set $both .root.Values.gpu.resource (toString .group.gpus) }}{{ end -}}
limits:
  {{- toYaml $both | nindent 2 }}
requests:
  {{- toYaml $both | nindent 2 }}
{{- end }}

{{/* Where a recipe lies: "Chart" is its text in a ConfigMap of ours, "Own" in one of the user's, "Image" in the image. */}}
{{- define "attune.recipePath" -}}
{{- if or .inline .configMap.name -}}
/etc/attune/{{ ternary "recipe.yaml" .configMap.key (not (empty .inline)) }}
{{- else if not .path -}}
{{- fail "recipe: path, inline and configMap.name are all empty; give one of them" -}}
{{- else if isAbs .path -}}
{{ .path }}
{{- else -}}
/opt/attune/{{ .path }}
{{- end -}}
{{- end }}

{{/* The volume of a recipe, or nothing: dict recipe, name (of the ConfigMap that has its text). */}}
{{- define "attune.recipeVolume" -}}
{{- if or .recipe.inline .recipe.configMap.name -}}
- name: recipe
  configMap: {name: {{ ternary .name .recipe.configMap.name (not (empty .recipe.inline)) }}}
{{- end -}}
{{- end }}

{{/* The reward server's recipe as an object: its own, or the run's where it has none. */}}
{{- define "attune.rewardRecipe" -}}
{{- $own := .Values.rewardServer.recipe -}}
{{- ternary $own .Values.recipe (not (empty (or $own.path $own.inline $own.configMap.name))) | toJson -}}
{{- end }}

{{- define "attune.redisUrl" -}}
{{- if eq .Values.redis.mode "external" -}}
{{- .Values.redis.url -}}
{{- else -}}
redis://{{ include "attune.fullname" . }}-redis:6379/0
{{- end -}}
{{- end }}

{{- define "attune.rewardUrl" -}}
{{- if eq .Values.rewardServer.kind "RayService" -}}
http://{{ include "attune.fullname" . }}-reward-serve-svc:8000
{{- else -}}
http://{{ include "attune.fullname" . }}-reward:8077
{{- end -}}
{{- end }}

{{/* Whether the run scores with the reward server of this release. */}}
{{- define "attune.usesReward" -}}
{{- if and (ne .Values.rewardServer.kind "none") .Values.rewardServer.useInRun }}true{{ end -}}
{{- end }}

{{/* An environment variable from a Secret: dict name, secret (name, key). */}}
{{- define "attune.secretEnv" -}}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ .secret.name }}, key: {{ .secret.key }}}}
{{- end }}
